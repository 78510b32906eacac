"""One module per artefact of the paper or study: what to run, how to compare, how to draw."""
