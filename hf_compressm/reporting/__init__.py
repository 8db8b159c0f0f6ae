"""What was done to a model: as a report, a figure, a model card, and a record that is saved with it."""
