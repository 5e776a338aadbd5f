"""The ablation lab: a study is a TOML file, and each of its cells is a training run."""
