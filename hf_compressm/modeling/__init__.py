"""The format of slim models: sizes by layer in the config, the mixer that projects, and the code that builds both."""
