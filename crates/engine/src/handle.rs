//! CONTRACT (bodies to be written by the owner of this crate): how the rest of the process talks to the engine's thread.
/*
pub struct EngineConfig {
    pub max_step_tokens: u32,        // --max-num-batched-tokens (clamped to geometry)
    pub max_running: u32,            // --max-num-seqs
    pub max_queued_requests: usize,  // queue limit
    pub max_queued_tokens: usize,
    pub prefix_caching: bool,
    pub look_ahead: Option<bool>,    // None: Executor::is_asynchronous
    ...
}
pub fn start(config: EngineConfig, make: impl FnOnce() -> Result<Box<dyn Executor>, BoxError> + Send + 'static)
    -> Result<(EngineHandle, Receiver<Vec<Event>>), StartError>   // blocks until the executor is loaded; std sync_channel, bounded
EngineHandle: Clone + Send + Sync
  submit(EngineRequest) -> Result<(), AdmissionError>   // QueueFull{..}, TooLong{needed_blocks, have}, NeverFits, Stopping, Dead ; decided without waiting for the engine thread
  cancel(RequestId); 
  stop(RequestId, choice: u32, kept_tokens: u32)        // the demultiplexer found a stop string after that many tokens
  stats() -> &EngineStats     // atomics: running, waiting, kv blocks used/total, prefix queries/hits, preemptions, prompt/generation tokens, wasted, steps, faults, step-time; lock-free
  health() -> EngineHealth    // Running{busy, last_progress: Duration ago}, Dead(reason)
  geometry() -> &Geometry
  shutdown(grace)             // end all
*/
