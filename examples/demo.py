"""`make demo`: a real model in 4 bits, fine-tuned on a practical task, measured before and after.

quantize   the pretrained model to NF4 with double quantization
evaluate   it on held-out rows: how many answers are right to the letter?
finetune   LoRA on the frozen 4-bit weights, as examples/requests.yaml says
evaluate   the same rows again, with the adapter
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.config import EvaluateConfig, FinetuneConfig, load_config
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.evaluate import EvaluationResult, evaluate
from halfbyte.recipes.finetune import RunResult, finetune
from halfbyte.recipes.quantize import quantize

HERE = Path(__file__).parent
SAMPLES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="models/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="the pretrained model: a directory or a .gguf file",
    )
    parser.add_argument("--config", type=Path, default=HERE / "requests.yaml")
    arguments = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 100, highlight=False)
    try:
        run_demo(arguments.model, arguments.config, console)
    except HalfbyteError as error:
        raise SystemExit(f"error: {error}") from None


def run_demo(model: str, config_file: Path, console: Console) -> None:
    config = load_config(FinetuneConfig, config_file, {"overwrite_output_dir": True})
    console.rule("[bold]1. quantize")
    quantized = quantize(model, config.model_name_or_path, overwrite=True)
    console.print(
        f"{quantized.quantized_parameters:,} of {quantized.parameters:,} parameters in NF4 with double quantization:"
        f" {quantized.bits_per_parameter:.3f} bits each, {quantized.bytes / 1e6:.1f} MB,"
        f" in {quantized.seconds:.1f} s\nsha256 {quantized.sha256}"
    )
    console.rule("[bold]2. before: the pretrained model on held-out rows")
    before = measure(config, None, console)
    console.rule("[bold]3. finetune")
    run = finetune(config, console)
    console.print(
        f"{run.steps} steps in {run.training_seconds:.0f} s, {run.tokens_per_second:,.0f} tokens/s,"
        f" peak {run.peak_bytes / 1e9:.2f} GB"
    )
    unchanged = run.base_sha256 == quantized.sha256
    console.print(f"base weights after training: sha256 {run.base_sha256} ({'unchanged' if unchanged else 'CHANGED'})")
    console.rule("[bold]4. after: the same rows, with the adapter")
    after = measure(config, run.output_dir, console)
    show(before, after, run, config, console)


def measure(config: FinetuneConfig, adapter: str | None, console: Console) -> EvaluationResult:
    """Loss and exact match on the configuration's held-out rows."""
    started = time.perf_counter()
    result = evaluate(
        EvaluateConfig(
            model_name_or_path=config.model_name_or_path,
            adapter=adapter,
            dataset=config.eval_dataset,
            per_device_eval_batch_size=40,
            max_new_tokens=64,
        ),
        console,
    )
    console.print(f"{result.rows} rows answered in {time.perf_counter() - started:.0f} s")
    return result


def show(
    before: EvaluationResult, after: EvaluationResult, run: RunResult, config: FinetuneConfig, console: Console
) -> None:
    table = Table(title=f"{before.rows} held-out rows")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("exact match", f"{before.exact_match:.1%}", f"[bold green]{after.exact_match:.1%}")
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    console.print(table)
    for old, new in list(zip(before.samples, after.samples, strict=True))[:SAMPLES]:
        console.print()
        for name, text, style in (
            ("asked", old.prompt, "bold"),
            ("wanted", old.expected, ""),
            ("before", " ".join(old.got.split())[:200], "red"),
            ("after", new.got, "green" if new.got == new.expected else "red"),
        ):
            console.print(Text(f"{name:>7}  ").append(text, style=style))
    console.print(
        f"\nThe adapter, its tokenizer, metrics.jsonl and run.json are in [bold]{run.output_dir}[/bold].\n"
        "Ask it something:\n"
        f"  .venv/bin/halfbyte generate --model_name_or_path {config.model_name_or_path}"
        f" --adapter {run.output_dir} \\\n"
        '    --system "Turn the message into one JSON record." --prompt "Two rye loaves for Friday please. Ana"\n'
        f"See the curves:   .venv/bin/tensorboard --logdir {run.output_dir}\n"
        "Train on your own rows: copy examples/requests.yaml, change dataset, and run\n"
        "  .venv/bin/halfbyte finetune your.yaml",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
