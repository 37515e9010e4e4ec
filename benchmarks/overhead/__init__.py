"""What watching costs, beside what other tools cost: `python -m benchmarks.overhead`, one run, interleaved."""
