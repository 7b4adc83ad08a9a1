-- Epochs after the server may have lost its latest writes: a run of the server has 2^20 of them, more than any loss.
-- uses: shard

local RUN_EPOCHS = 2 ^ 20

-- The first epoch of the next run: above every one that may have been given out.
local function next_run(epoch)
  return (math.floor(tonumber(epoch) / RUN_EPOCHS) + 1) * RUN_EPOCHS
end
