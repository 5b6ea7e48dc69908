"""The parts of the page, in its order: each module answers one question from the artifacts that it needs."""
