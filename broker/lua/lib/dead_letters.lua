-- Dead letters: an entry for each job whose attempts were used up, its request beside it. The oldest go when they are too
-- old, or all of them too large.
-- uses: shard, counters

local DEAD_AGE_MS = 7 * 24 * 3600 * 1000
local DEAD_BYTES = 256 * 1024 * 1024

local SIZE, AT = 16, 18 -- where an entry has them, as ``add_letter`` writes it

local function remove_letter(entry)
  call('XDEL', P .. 'dead', entry[1])
  call('DEL', P .. 'dead_request:' .. entry[1])
  add('budget', 'dead:bytes', -tonumber(entry[2][SIZE] or 0))
end

local function trim_dead(now)
  for _ = 1, 64 do
    local entry = call('XRANGE', P .. 'dead', '-', '+', 'COUNT', 1)[1]
    if not entry then return add('budget', 'dead:bytes', -counter('budget', 'dead:bytes')) end
    local died_at = tonumber(entry[2][AT] or string.match(entry[1], '^%d+'))
    if died_at >= now - DEAD_AGE_MS and counter('budget', 'dead:bytes') <= DEAD_BYTES then return end
    remove_letter(entry)
  end
end

local function add_letter(job, cause, envelope, now)
  local id = call('XADD', P .. 'dead', '*', 'id', job.id, 'cause', cause, 'worker', job.owner, 'attempts', job.attempts,
    'pool', job.pool, 'lane', job.lane, 'tenant', job.tenant, 'size', job.size, 'at', int(now))
  call('SET', P .. 'dead_request:' .. id, envelope, 'PX', int(DEAD_AGE_MS + EXPIRY_SLACK_MS))
  add('budget', 'dead:bytes', tonumber(job.size))
  trim_dead(now)
end
