-- Raises a worker's renewal number, which keeps all its leases, and its control stream alive.
-- ARGV: prefix, session id, id of the last control message read (older ones are trimmed).
-- Reply: the new number, or -1 if the session was declared dead.
-- Invariant: 3 fence (the dead do not come back).
-- uses: clock, fence, streams

local session_id = ARGV[2]
if is_fenced(session_id) then return -1 end
now_ms() -- the queue's clock goes on also while no Manager acts
keep_stream(P .. 'ctl:' .. session_id, ARGV[3], CONTROL_TTL_MS)
return call('HINCRBY', P .. 'renewals', session_id, 1)
