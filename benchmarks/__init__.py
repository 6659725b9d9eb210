"""`make bench`: halfbyte and today's usual stack, side by side, in turn, in one run. docs/benchmarks.md is its page."""
