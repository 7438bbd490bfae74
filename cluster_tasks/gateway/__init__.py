"""What stands between the jobs and their providers: a breaker and limits that all nodes share, and fallbacks."""
