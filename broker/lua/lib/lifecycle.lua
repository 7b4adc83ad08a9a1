-- The one way from a state to another. ``TRANSITIONS`` and ``TERMINAL`` are made from queue_schemas/lifecycle.py.
-- uses: shard, transitions

-- Moves a job to ``state``, with the fields that change with it. The record of one that ends becomes a tombstone: it keeps
-- these fields alone, unless its output is persisted.
local function transition(job, state, ...)
  if not TRANSITIONS[job.state .. ' ' .. state] then
    error('lifecycle: job ' .. job.id .. ' cannot go from ' .. job.state .. ' to ' .. state)
  end
  local key = P .. 'job:' .. job.id
  if TERMINAL[state] then
    local has_answer = state == 'done' or state == 'failed'
    job.is_kept = job.persisted == '1' and not job.is_forgotten and (has_answer or job.listed == '1')
    if not job.is_kept then call('DEL', key) end
  end
  job.state = state
  call('HSET', key, 'state', state, ...)
  if TERMINAL[state] and not job.is_kept then call('PEXPIRE', key, TOMBSTONE_MS) end
end
