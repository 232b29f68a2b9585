"""How fast a training would be on machines that are not there: a discrete-event model of the pipeline, fed with measured costs."""
