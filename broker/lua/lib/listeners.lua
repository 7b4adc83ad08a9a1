-- Routers that are sent what a persisted job says: it has no one reply stream.
-- uses: shard, clock

local function listen(id, router, deadline)
  local key = P .. 'listeners:' .. id
  call('SADD', key, router)
  call('PEXPIRE', key, int(math.max(tonumber(deadline) - now_ms(), 0) + EXPIRY_SLACK_MS))
end

-- Who listens to a job, also after it ended in this call.
local function listeners_of(job)
  job.listeners = job.listeners or call('SMEMBERS', P .. 'listeners:' .. job.id)
  return job.listeners
end

-- Writes an entry for a Router that listens to these jobs; one that is gone listens no more.
local function send(router, field, value, ids)
  if call('XADD', P .. 'reply:' .. router, 'NOMKSTREAM', '*', field, value) then return end
  for _, id in ipairs(ids) do call('SREM', P .. 'listeners:' .. id, router) end
end
