-- What may be told of stored jobs, live or kept.
-- ARGV: prefix, then job ids.
-- Reply: per job {} if it is unknown, not stored, or nothing is kept of it; else its id, the server's time, and fields of
--       its record in the order of broker/operations/persisted_jobs.py.
-- Invariant: 9 isolation (whoever asks compares the tenant).

local answers = {}
for i = 2, #ARGV do answers[#answers + 1] = stored().describe(ARGV[i]) end
return answers
