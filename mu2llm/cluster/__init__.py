"""From laptop to cluster: which Ray a command joins, jobs on a cluster, and what keeps either from working."""

from mu2llm.cluster.session import quieten_ray_data, session

__all__ = ["quieten_ray_data", "session"]
