-- The one way from a state to another. ``TRANSITIONS`` and ``TERMINAL`` are made from queue_schemas/lifecycle.py.
-- uses: records, transitions

-- Moves a job to ``state``, and writes its record as it stands now, with more fields beside it. The record of one that ends
-- becomes a tombstone, unless its output is persisted.
local function transition(job, state, ...)
  if not TRANSITIONS[job.state .. ' ' .. state] then
    error('lifecycle: job ' .. job.id .. ' cannot go from ' .. job.state .. ' to ' .. state)
  end
  local is_asked_for = state == 'done' or state == 'failed' or job.listed == '1'
  job.state, job.is_kept = state, job.persisted == '1' and not job.is_forgotten and is_asked_for
  if TERMINAL[state] and not job.is_kept then return leave_tombstone(job.id, state, job.epoch, job.aid) end
  save(job, ...)
end
