#!/usr/bin/env bash
# Drains the Ray node of this machine or container before it stops: Serve starts its replicas elsewhere,
# and these finish their sessions first. A pod runs it as its preStop hook, the systemd unit as ExecStop.
#   drain-node SECONDS [NODE_ID]   SECONDS is the longest that it may take
set -u
limit_s=${1:?the longest that it may take, in seconds}
own='import ray; ray.init(logging_level="ERROR", log_to_driver=False); print(ray.get_runtime_context().get_node_id())'
node=${2:-$(python -c "$own" | tail -1)}
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "it is stopping" \
  --deadline-remaining-seconds "$limit_s" || exit 0  # a node that has left has nothing to drain
end=$((SECONDS + limit_s))
while ((SECONDS < end)) && ray list actors --format json --filter "node_id=$node" --filter "state=ALIVE" |
  grep -q ServeReplica; do
  sleep 2
done
