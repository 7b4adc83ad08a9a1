-- The end of a job of which nothing is persisted.
-- uses: records, counters, lifecycle

local function total(job, event)
  add('counters', job.pool .. ':' .. without_region(job.lane) .. ':' .. event, 1)
end

-- Ends a job that waits and runs no more, and returns its budget. ``aid``: the attempt that ended it by its own word, or ''.
-- ``cause`` is counted beside the state of what was cancelled or expired: 'waiting', 'running' or 'router_gone'.
local function write_tombstone(job, state, aid, cause)
  job.aid = aid
  transition(job, state)
  gather('ZREM', P .. 'deadlines', job.id)
  spend(job.pool, job.tenant, -1, -tonumber(job.size))
  total(job, state)
  if cause then total(job, state .. '/' .. cause) end
end
