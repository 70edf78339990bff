"""A robot arm at a table that is told what to do: language, scene, expert, environment."""
