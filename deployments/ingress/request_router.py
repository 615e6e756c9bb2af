"""Lets `router/` choose the leader of a request in Ray Serve's request routing."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from stagemesh.deployments.ingress import lane_view
from stagemesh.stages.messages.request import EngineRequest

# Serve ships this class by value, with every global that it names: `lane_view` is named as a module, which
# travels by reference, so that the class in the router process meets that process's own view.


class LaneRouter(RequestRouter):
    """Runs in each router replica."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        lane_view.VIEW.set_lanes(
            {
                replica.replica_metadata["lane"]: replica.replica_metadata["stats"]
                for replica in replicas
                if "lane" in replica.replica_metadata
            }
        )

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank per lane, best first: Serve takes the next when one is full."""
        if pending_request is not None:
            # Without this Serve retries in a busy loop while no replica can take the request.
            pending_request.routing_context.should_backoff = True
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if not isinstance(request, EngineRequest):
            return [candidate_replicas]
        by_lane = {replica.replica_metadata.get("lane"): replica for replica in candidate_replicas}
        ranked = [[by_lane[lane]] for lane in lane_view.VIEW.choose(request) if lane in by_lane]
        # Those that the view does not know yet come last; those that it does not rank cannot take a request now.
        unknown = [replica for lane, replica in by_lane.items() if lane is None or not lane_view.VIEW.knows(lane)]
        return [*ranked, unknown]
