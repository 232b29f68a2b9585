"""The way of weights from the learner to the actors: one versioned board per policy."""
