-- Looks at the first jobs of waiting streams: since when the longest-waiting one waits, and their earliest deadline.
-- ARGV: prefix, tenants of a band that are looked at, at most, then pairs: queue key, tenants of a band to pass.
-- Reply: per queue key {since (queue ms), earliest deadline (queue ms), both '' if there is no job, 1 if none is behind these}.
-- uses: queue

local answers = {}
for i = 3, #ARGV, 2 do
  local queues, are_last = streams_at(ARGV[i], tonumber(ARGV[2]), tonumber(ARGV[i + 1]))
  local since, due = math.huge, math.huge
  for _, queue in ipairs(queues) do
    local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
    local job = entry and load_job(entry[2][2])
    if job and job.at ~= '' then since, due = math.min(since, job.at), math.min(due, job.deadline) end
  end
  answers[#answers + 1] = { since < math.huge and int(since) or '', due < math.huge and int(due) or '', are_last and 1 or 0 }
end
return answers
