"""Other people's models on the ops of this package; each module names the extra that it needs."""
