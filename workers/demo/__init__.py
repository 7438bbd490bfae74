"""``cluster-tasks demo``: the main job on real text, with a node killed midway, and a count of what came of it."""
