"""What Prometheus is told of a cluster.

Nodes count how their jobs end, and tell Redis as often as they beat (``counts``). Whoever is scraped, a coordinator or
Flower, reads one snapshot of the whole cluster for each scrape (``snapshot``), and tells it in the words of Prometheus
(``families``).
"""
