"""The settings of this deployment. The ready-made app reads the file from the directory in which a command is started;
an app of your own does after ``app.config_from_object("celeryconfig")``.

Keys that begin with ``cluster_`` are the cluster's; a variable wins over its key (``CLUSTER_LEASE_S`` over
``cluster_lease_s``). All others are Celery's own. What stands behind a ``#`` shows the default.

Addresses and passwords belong into variables, not here: ``CLUSTER_BROKER_URL``, ``CLUSTER_RESULT_BACKEND``,
``CLUSTER_REGISTRY_URL``, ``CLUSTER_REGISTRY_JOIN``, ``CLUSTER_LLM_API_KEY``, ``CLUSTER_EMBEDDING_API_KEY``,
``CLUSTER_RERANK_API_KEY``, ``CLUSTER_ALERT_URL``, ``CLUSTER_ALERT_SECRET``, ``CLUSTER_FLOWER_PASSWORD``.
"""

# --- Which node gets a job -------------------------------------------------------------------------------------------

# round_robin, least_connection, weighted, consistent_hash or adaptive; for all request types that name no other.
cluster_strategy = "least_connection"
# Jobs of one session go to the node that knows it.
cluster_strategy_llm = "consistent_hash"
# cluster_strategy_retrieval = None
# cluster_strategy_embedding = None
# Of the request types of your own tasks:
# cluster_strategies = {"ocr": "weighted"}

# cluster_virtual_nodes = 160  # points of a node on the ring of consistent_hash
# cluster_zone_bound = 1.25  # a full zone is passed over when it is loaded so many times as all are on average
# cluster_snapshot_s = 0.25  # how old a producer's view of the nodes may be

# --- When a node is lost ---------------------------------------------------------------------------------------------

# A node beats once in heartbeat_s. Its work goes to others when no beat came for lease_s (at least twice as long).
cluster_heartbeat_s = 1.0
cluster_lease_s = 3.0
# cluster_health_check_s = 0.5
# cluster_failure_threshold = 1  # checks in a row that must find a node still
# cluster_recovery_threshold = 2  # beats before a node that was lost and came back gets jobs
# A job that killed so many processes is kept in quarantine: for how long, and how many of them.
# cluster_max_crash_deliveries = 3
# cluster_quarantine_ttl_s = 2592000.0
# cluster_quarantine_max = 1000
# How long running jobs may take to end after SIGTERM; then others run them. Whatever stops a node must wait longer than
# this, by five seconds or more.
cluster_drain_timeout_s = 30.0
# What a node does with running jobs that others have been given: "kill" or "abandon". Threads cannot be killed.
# cluster_on_fenced = "kill"
# A node that beats, but whose event loop, consumer or pool does nothing for so long, gives its jobs away and exits.
# cluster_stuck_s = None  # ten leases, 30 s at least

# --- Balance of the lists --------------------------------------------------------------------------------------------

# Waiting jobs move from a list above 1.2 of its node's share to shorter ones: when a node joins, and every rebalance_s.
# cluster_auto_rebalance = True
# cluster_rebalance_s = 10.0

# --- Nodes that do their jobs worse than the others -------------------------------------------------------------------

# A node is taken out when at least half more of its runs of a task fail than on others, or take so many times as long;
# never more than half of the nodes. Where single sessions or collections are that much heavier than others, a node that
# holds them may look slow: 0 leaves the time out of it.
# cluster_ejection = True
# cluster_ejection_slow_factor = 10.0
# After cluster_breaker_timeout_s it is given single jobs as probes; cluster_breaker_success_threshold of them that
# succeed let it in again, with more and more slots.

# --- What this node is: usually set by variables, per machine --------------------------------------------------------

# cluster_serves = ["llm", "retrieval", "embedding"]  # else all types that its tasks declare
# cluster_registry_join = {"east": "redis://127.0.0.1:6381/0"}  # other clusters, to look at: docs/datacentres.md
# cluster_metadata = {"rack": "3", "weight": "2"}
# cluster_zone = "west"  # of nodes and of callers, whose jobs go to their own zone first: docs/datacentres.md
# cluster_max_qps = 0.0  # 0: no limit
# cluster_max_memory_mb = 0  # what the strategy adaptive measures the node's memory by; 0: not at all
# cluster_roles = ["worker"]
# cluster_address = None  # else the name of the host
# cluster_port = 0
# A coordinator serves the metrics of the cluster there: docs/metrics.md. 0: nowhere.
# cluster_metrics_port = 0
# cluster_metrics_host = "127.0.0.1"

# --- What is the same for all ----------------------------------------------------------------------------------------

# cluster_name = "cluster"  # two clusters on one Redis have two names
# cluster_sentinel_master = "mymaster"  # the group behind a sentinel:// URL

# A job whose message is larger is refused in its caller.
# cluster_max_message_bytes = 16777216
# A job whose result is larger fails. Redis must take so much at once, and the network carry it there within 5 s.
# cluster_max_result_bytes = 134217728

# --- Models ----------------------------------------------------------------------------------------------------------

# Any endpoint that speaks the OpenAI protocol. Without one, local stand-ins answer that need no download.
# cluster_llm_base_url = "http://127.0.0.1:8000/v1"
# cluster_llm_model = "name-of-the-model"
# cluster_embedding_base_url = "http://127.0.0.1:8000/v1"
# cluster_embedding_model = "name-of-the-model"  # without a URL: "local-hash" or "local-static"
# What ranks passages anew where rerank=True asks for it: an endpoint that takes /rerank as Jina and Cohere do.
# cluster_rerank_base_url = "http://127.0.0.1:8000/v1"
# cluster_rerank_model = "name-of-the-model"
# Who answers when that one is unavailable, in this order; without base_url another model of the same endpoint.
# cluster_llm_fallbacks = [{"model": "a-smaller-one"}, {"base_url": "http://backup:8000/v1", "model": "name"}]
# The same model at other addresses:
# cluster_embedding_fallbacks = [{"base_url": "http://backup:8000/v1"}]
# cluster_rerank_fallbacks = [{"model": "a-smaller-one"}]
# How long a request may take, how often it is repeated, and how long it waits for its turn under a limit.
# cluster_llm_timeout_s = 120.0
# cluster_embedding_timeout_s = 30.0
# cluster_rerank_timeout_s = 30.0
# cluster_provider_max_retries = 4
# cluster_provider_wait_s = 10.0
# What an endpoint may be asked by the whole cluster in a minute; 0: no limit. Fallbacks have keys of the same names.
# cluster_llm_requests_per_minute = 0
# cluster_llm_tokens_per_minute = 0
# cluster_embedding_requests_per_minute = 0
# cluster_embedding_tokens_per_minute = 0
# cluster_rerank_requests_per_minute = 0
# cluster_rerank_tokens_per_minute = 0
# cluster_breaker_failure_threshold = 5
# cluster_breaker_success_threshold = 2
# cluster_breaker_timeout_s = 30.0

# What jobs computed is kept in a Redis of its own that may forget it, or in a Redis Cluster: docs/caching.md.
# cluster_cache_url = "redis://127.0.0.1:6380/0"
# cluster_cache_ttl_s = 86400.0
# cluster_cache_search_ttl_s = 300.0
# cluster_cache_kept_s = 86400.0  # How long what has expired is kept, for when it cannot be computed anew.
# cluster_cache_staleness_s = 1.0
# cluster_cache_timeout_s = 0.5
# cluster_cache_max_value_mb = 16
# cluster_cache_local_entries = 10000
# cluster_cache_local_mb = 64

# Where collections live: every node that serves retrieval must reach it.
# cluster_data_dir = "cluster-data"
# cluster_vector_url = "qdrants://:APIKEY@vectors.example:6333"  # Qdrant instead: docs/collections.md.
# cluster_shards = 1  # Of collections that are made from now on.
# cluster_optimize_s = 300.0  # How often they are compacted; 0: never.
# cluster_shard_replicas = 2  # nodes with the roles worker and cache that have each shard in memory: docs/shards.md
# cluster_search_hedge = True  # Another of these searches as well what the first is late with.

# --- Celery ----------------------------------------------------------------------------------------------------------

# Never pickle: whoever can write to Redis could run code on the nodes.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]

# Seconds; how long results can be fetched.
result_expires = 24 * 3600

# Flower lives on these events.
worker_send_task_events = True
task_send_sent_event = True
task_track_started = True

timezone = "UTC"
enable_utc = True
