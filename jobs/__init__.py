"""The job layer, in reading order.

Words and tables: `settings`, `states`, `models`, `database`. In: `body`, `intake`, `admission`. Order and ends:
`claims`, `outcomes`, `batches`, `cancels`, `leases`, `sweeper`. Out: `reads`. Redis: `broker`, `redis_transport`,
`wakeups`, `arrivals`, `celery_results`, `pool`, `valkey`. One worker process: `worker_main`, `worker`, `claimer`,
`holdings`, `encoder`, `answers`, `writer`, `lease_keeper`, `supervisor`, `engine_process`. Files instead of servers:
`batch_file`, `run_files`.

Nothing here loads torch: models run in engine processes, on the other end of a pipe.
"""
