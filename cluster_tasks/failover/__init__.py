"""Finding dead nodes and moving their work to living ones."""
