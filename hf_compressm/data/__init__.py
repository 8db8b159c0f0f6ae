"""The tokens that models are measured, fitted and evaluated on."""
