#!/usr/bin/env bash
# Drains the Ray node of this machine or container before it stops: Serve starts its replicas elsewhere,
# and these finish their sessions first. A pod runs it as its preStop hook, the systemd unit as ExecStop.
#   drain-node <seconds>   the longest that it may take
set -u
limit_s=${1:?the longest that it may take, in seconds}
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the node is stopping" \
  --deadline-remaining-seconds "$limit_s" || exit 0  # the head cannot be drained, nor can a node that left
end=$((SECONDS + limit_s))
while ((SECONDS < end)) && pgrep -f '^ray::ServeReplica:' > /dev/null; do
  sleep 2
done
