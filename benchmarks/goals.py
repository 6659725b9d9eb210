"""What is wanted of each figure. A goal that is not met is shown as not met."""

from benchmarks.figures import AT_MOST, Goal

GOALS = {
    "A step": Goal(3.5),
    "A against our own 16 bits": Goal(1.05, AT_MOST),
    "A first step": Goal(3.0, AT_MOST),
    "B whole run": Goal(8.0),
    "C same checkpointing": Goal(1.7),
    "C standard recipe": Goal(2.5),
    "D quantizing load": Goal(20.0),
    "E decode": Goal(3.0),
    "P product": Goal(0.88),
    "P attention": Goal(5.0),
}
