-- Jobs as their records say them. A waiting job waits at a queue key: ``<pool>:<lane>``, or ``<pool>:<lane>@<region>`` while
-- only workers of that region may run it: until ``eligible_at``, and not any more once it was leased.
-- uses: shard

local FIELDS = { 'state', 'epoch', 'aid', 'attempts', 'max', 'owner', 'pool', 'lane', 'band', 'tenant', 'reply',
  'persisted', 'listed', 'deadline', 'size', 'at', 'queue', 'entry', 'handed_back', 'avoid', 'avoid_until', 'resume',
  'suspicion', 'not_charged', 'cleared', 'handed', 'eligible_at' }

-- The record of a job without its envelope; nil if there is none.
local function load_job(id)
  local values = call('HMGET', P .. 'job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = { id = id }
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

local function queue_key(job)
  return job.pool .. ':' .. job.lane
end

-- A queue key, or its part behind the pool, without its region.
local function without_region(key)
  return string.match(key, '^[^@]*')
end
