//! Work recorded once and replayed.
//!
//! Owns a recording and its end, also when what is recorded fails. Never decides what is recorded: addresses and
//! numbers in it stay as they were.

use cudarc::driver::sys;

use super::error::{CudaError, Result, called, check};
use super::stream::Gpu;

/// A recorded piece of work, ready on the device.
pub struct Graph {
    gpu: Gpu,
    executable: sys::CUgraphExec,
    nodes: usize,
}

impl Gpu {
    /// Records what `record` issues to the stream instead of running it. Nothing in it may wait for the device.
    ///
    /// # Errors
    /// Those of `record`; the driver's. The stream is as before in each case.
    pub fn capture<E: From<CudaError>>(
        &self,
        record: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream that lives.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.stream(), mode) };
        check(result, self.stream(), || "begin a capture".to_owned())?;
        let mut recording = Recording { gpu: self, ended: false };
        record()?;
        let graph = recording.end()?;
        Ok(Graph::new(self, &graph)?)
    }
}

/// A stream that records. Dropped, it ends the capture and what was recorded is gone.
struct Recording<'a> {
    gpu: &'a Gpu,
    ended: bool,
}

impl Recording<'_> {
    fn end(&mut self) -> Result<Template> {
        self.ended = true;
        let mut graph = std::ptr::null_mut();
        // SAFETY: a place for one graph, a stream that captures.
        let result = unsafe { sys::cuStreamEndCapture(self.gpu.stream(), &raw mut graph) };
        let template = Template(graph);
        check(result, self.gpu.stream(), || "end a capture".to_owned()).map(|()| template)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // The error that led here is the one to report.
            let _ = self.end();
        }
    }
}

/// A graph that is not yet on the device.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: owned, destroyed once; executables made from it do not need it.
            unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

impl Graph {
    fn new(gpu: &Gpu, template: &Template) -> Result<Self> {
        let mut nodes = 0;
        // SAFETY: without a place for nodes the driver writes their number alone.
        let result = unsafe { sys::cuGraphGetNodes(template.0, std::ptr::null_mut(), &raw mut nodes) };
        called(result, "cuGraphGetNodes")?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: a place for one executable, a graph that lives.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, template.0, 0) };
        called(result, &format!("make a graph of {nodes} nodes executable"))?;
        let graph = Self { gpu: gpu.clone(), executable, nodes };
        // SAFETY: both live. Otherwise the first launch would do it.
        let result = unsafe { sys::cuGraphUpload(graph.executable, gpu.stream()) };
        check(result, gpu.stream(), || format!("upload of a graph of {nodes} nodes"))?;
        Ok(graph)
    }

    /// Issues all of it behind what was issued before.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self) -> Result<()> {
        // SAFETY: both live as long as `self`.
        let result = unsafe { sys::cuGraphLaunch(self.executable, self.gpu.stream()) };
        check(result, self.gpu.stream(), || format!("launch of a graph of {} nodes", self.nodes))
    }

    /// Kernels, copies and fills in it.
    pub const fn nodes(&self) -> usize {
        self.nodes
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: owned, destroyed once; the driver keeps what still runs.
        unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}
