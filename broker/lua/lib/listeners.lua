-- Routers that are sent what jobs say: the one that waits, or those that listen to a persisted job.
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

local outgoing, order = {}, {}

-- Frames for a Router, sent with all others of this call in one entry. ``id``: of a persisted job, to which it listens.
local function post(router, frames, id)
  if not outgoing[router] then order[#order + 1] = router end
  outgoing[router] = outgoing[router] or { frames = {}, ids = {} }
  table.insert(outgoing[router].frames, frames)
  table.insert(outgoing[router].ids, id)
end

local function send_posted()
  for _, router in ipairs(order) do
    send(router, 'f', table.concat(outgoing[router].frames), outgoing[router].ids)
  end
end
