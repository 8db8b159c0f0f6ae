"""The state shrinks while a model trains: a callback of the Trainer, and what it is made of."""
