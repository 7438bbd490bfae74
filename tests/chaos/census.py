"""Where every job of a cluster is at one instant, read in one step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import redis

from cluster_tasks.broker.members import member_ids
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text
from tests.chaos.jobs import ChaosJobs

# KEYS     none, it walks over all
# ARGV     1 cluster name
# Returns  {{key, message, …}, …} of all that holds messages
READ = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  local own = string.find(key, 'node.', 1, true) == 1 or string.find(key, 'waiting.', 1, true) == 1
    or string.find(key, 'suspect.', 1, true) == 1
  if kind == 'list' and (own or string.find(key, ARGV[1] .. ':remains:', 1, true) == 1) then
    found[#found + 1] = { key, unpack(redis.call('LRANGE', key, 0, -1)) }
  elseif kind == 'hash' and string.find(key, ARGV[1] .. ':[^:]*unacked:') == 1 then
    found[#found + 1] = { key, unpack(redis.call('HVALS', key)) }
  elseif kind == 'zset' and key == ARGV[1] .. '.delayed' then
    found[#found + 1] = { key, unpack(redis.call('ZRANGE', key, 0, -1)) }
  elseif string.find(key, ARGV[1] .. ':terminal:', 1, true) == 1 then
    found[#found + 1] = { key }
  end
end
found[#found + 1] = { ARGV[1] .. ':quarantine', unpack(redis.call('HKEYS', ARGV[1] .. ':quarantine')) }
return found
"""


@dataclass(frozen=True)
class Census:
    """Job id → the places where it is."""

    places: dict[str, list[str]]
    ended: set[str]

    def count(self) -> Counter[str]:
        """How many jobs are in each place."""
        return Counter(place for places in self.places.values() for place in places)


def take_census(jobs: ChaosJobs) -> Census:
    """Read all lists, hashes and markers of the cluster of the default name, in one script."""
    return census_of(jobs.cluster.client, jobs.cluster.keys)


def census_of(client: redis.Redis, keys: Keys) -> Census:
    """The same, of what is in a Redis."""
    found: Any = client.eval(READ, 0, keys.name)
    places: dict[str, list[str]] = {}
    ended: set[str] = set()
    for key, *messages in found:
        name = text(key)
        if name.startswith(keys.terminal("")):
            ended.add(name.removeprefix(keys.terminal("")))
        for message in messages:
            for job_id in _jobs_of(name, text(message), keys):
                places.setdefault(job_id, []).append(name)
    return Census(places, ended)


def _jobs_of(place: str, message: str, keys: Keys) -> list[str]:
    if place == keys.quarantine:
        return [message]
    if place == keys.delayed:
        message = message.split("\n", 4)[-1]
    headers = json.loads(message)["headers"]
    return member_ids(headers) or [str(headers["id"])]
