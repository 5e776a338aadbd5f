"""The ablation lab: a study is a TOML file, its cells are runs."""
