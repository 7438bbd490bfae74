"""Nodes die, connections and replies are cut: no job is lost, none is committed twice."""
