"""RQ, with one retry: then a job whose worker died is run again when its time-out and a minute or more are over.

For speed: ``SimpleWorker``, which does not fork for each job, and a pool of them (``rq worker-pool``); published by
``enqueue_many``; no job descriptions in the log; hiredis. A result that is not wanted has ``result_ttl=0``.
"""

from __future__ import annotations

import os
import sys

import job
from redis import Redis
from rq import Queue, Retry

if __name__ == "__main__":
    queue = Queue(connection=Redis.from_url(os.environ[job.REDIS_URL]))
    lives_s = 500 if os.environ[job.RESULTS] == "1" else 0
    left = int(sys.argv[1])
    while left > 0:
        some = min(left, 1000)
        one = {"func": "job.noop", "result_ttl": lives_s, "retry": Retry(max=1)}
        queue.enqueue_many([Queue.prepare_data(**one) for _ in range(some)])
        left -= some
