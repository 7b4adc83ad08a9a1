-- Jobs as their records say them: a hash with the envelope (``env``), what every call needs packed in one field
-- (``record``), and fields of some jobs. Of one that has ended a tombstone is left, a string in the place of the hash:
-- state, epoch, and the attempt that ended it by its own word. ``queue`` and ``entry``: where it waits; ``entry`` of a
-- leased job that was handed over: the control message. A waiting job waits at a queue key: ``<pool>:<lane>``, or
-- ``<pool>:<lane>@<region>`` while only workers of that region may run it: until ``eligible_at``, and not any more once it
-- was leased. ``cost``: units of one prompt token that it is thought to cost (scheduling/cost.py), ``weight``: its tenant's
-- share, ``charged``: what its tenant was charged for the attempt that runs ('' for nothing), ``predicted``: how long it was
-- thought to wait as it came (ms; '' if unknown, or if it did not wait). ``pack_record`` and ``parse_record`` are made from
-- broker/redis/scripts.py.
-- uses: shard, record_format

-- Writes a job's record, and more fields beside it.
local function save(job, ...)
  call('HSET', P .. 'job:' .. job.id, 'record', pack_record(job), ...)
end

local function leave_tombstone(id, state, epoch, aid)
  call('SET', P .. 'job:' .. id, state .. ' ' .. epoch .. ' ' .. aid, 'PX', TOMBSTONE_MS)
end

-- The record of a job as it is written, or its tombstone; '' if there is neither.
local function read_record(id)
  local found = redis.pcall('HGET', P .. 'job:' .. id, 'record')
  return type(found) == 'table' and call('GET', P .. 'job:' .. id) or found or ''
end

-- A job; nil if there is none. Of one that has ended all but what its tombstone says is empty. An attempt that ended
-- without an answer began a new epoch: in the first there is nothing to say of it.
local function load_job(id)
  local record = read_record(id)
  local job = parse_record(id, record) or parse_record(id, record .. LACKING)
  if not job then return nil end
  local of = (job.epoch == '1' or job.at == '') and {} or call('HMGET', P .. 'job:' .. id, 'suspicion', 'not_charged',
    'cleared', 'handed_back', 'avoid', 'avoid_until')
  job.suspicion, job.not_charged, job.cleared, job.handed_back, job.avoid, job.avoid_until = of[1] or '', unpack(of, 2, 6)
  return job
end

local function queue_key(job)
  return job.pool .. ':' .. job.lane
end

-- A queue key, or its part behind the pool, without its region.
local function without_region(key)
  return string.match(key, '^[^@]*')
end
