-- Routers that are sent what jobs say: the one that waits, or those that listen to a persisted job.
-- uses: shard, clock
-- rarely: listeners_of

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

-- Who is sent what a job says: those that listen to a persisted one, or the Router that waits.
local function routers_of(job)
  return job.persisted == '1' and listeners_of(job) or { job.reply ~= '' and job.reply or nil }
end

-- Writes an entry for a Router; one that is gone listens no more to these persisted jobs.
local function send(router, field, value, ids)
  if call('XADD', P .. 'reply:' .. router, 'NOMKSTREAM', '*', field, value) then return end
  for _, id in ipairs(ids) do call('SREM', P .. 'listeners:' .. id, router) end
end

local outgoing, order = {}, {}

-- Frames of a job for its Routers: each is sent all of this call in one entry.
local function post(job, frames)
  for _, router in ipairs(routers_of(job)) do
    if not outgoing[router] then order[#order + 1] = router end
    outgoing[router] = outgoing[router] or { frames = {}, ids = {} }
    table.insert(outgoing[router].frames, frames)
    if job.persisted == '1' then table.insert(outgoing[router].ids, job.id) end
  end
end

local function send_posted()
  for _, router in ipairs(order) do
    send(router, 'f', table.concat(outgoing[router].frames), outgoing[router].ids)
  end
end
