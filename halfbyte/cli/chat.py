"""`halfbyte chat model.gguf --adapter runs/first`"""

from halfbyte.cli.flags import config_command
from halfbyte.config import ChatConfig


@config_command(ChatConfig, positional="model_name_or_path")
def command(config: ChatConfig) -> None:
    """Talk with a model, its adapters, or several side by side.

    Answers come word by word; /adapter NAME lets another adapter go on with the conversation, Ctrl-C stops an answer,
    /help lists the rest. Where lines are piped in, the answers alone go to standard output.
    """
    from halfbyte.recipes.chat_terminal import run_chat

    run_chat(config)
