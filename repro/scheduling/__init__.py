"""The scheduler of §3.4: throughput model, grid search, routers, placement and the two control loops; pure, without clock or I/O."""
