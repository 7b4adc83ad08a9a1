-- Telling Routers what became of their jobs, and finding that a Router is gone.
-- uses: shard, listeners

local NOBODY_WAITS = 'nobody waits for the answer'
local listening = {}

local function notify(job, kind, epoch, reason)
  local marker = kind .. ' ' .. job.id .. ' ' .. epoch .. ' ' .. reason
  if job.persisted == '1' then
    for _, router in ipairs(listeners_of(job)) do send(router, 'm', marker, { job.id }) end
  elseif job.reply ~= '' then
    call('XADD', P .. 'reply:' .. job.reply, 'NOMKSTREAM', '*', 'm', marker)
  end
end

local function nobody_waits(job)
  if job.reply == '' or job.persisted == '1' then return false end
  if listening[job.reply] == nil then listening[job.reply] = call('EXISTS', P .. 'reply:' .. job.reply) == 1 end
  return not listening[job.reply]
end
