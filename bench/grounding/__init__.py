"""Effects of routing on answers: scenes, the tiny model trained on them, the benchmark and its page."""
