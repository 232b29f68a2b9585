"""What a run tells of itself: a database, TensorBoard files, and a live view. None of it is ever waited for by the training."""
