-- Telling Routers what became of their jobs, and finding that a Router is gone.
-- uses: shard, listeners

local NOBODY_WAITS = 'nobody waits for the answer'
local listening = {}

local function notify(job, kind, epoch, reason)
  local marker = kind .. ' ' .. job.id .. ' ' .. epoch .. ' ' .. reason
  local ids = job.persisted == '1' and { job.id } or {}
  for _, router in ipairs(routers_of(job)) do send(router, 'm', marker, ids) end
end

local function nobody_waits(job)
  if job.reply == '' or job.persisted == '1' then return false end
  if listening[job.reply] == nil then listening[job.reply] = call('EXISTS', P .. 'reply:' .. job.reply) == 1 end
  return not listening[job.reply]
end
