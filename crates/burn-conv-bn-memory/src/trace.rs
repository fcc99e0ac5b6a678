//! wgpu's traces: the calls on a device, in RON.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

/// How actions start that describe launches. Others, such as a buffer's content, are skipped.
const READ: [&str; 3] = ["CreateBindGroup(", "CreateComputePipeline(", "Submit("];

/// A kernel launch, as [`BindingMeter`](crate::BindingMeter) reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel's function, with the types that it was compiled for.
    pub kernel: String,
    /// Bytes of the buffers that it was bound to, each part of a buffer once.
    pub bytes: u64,
}

/// Why a trace cannot be read, within a [`BindingError`](crate::BindingError).
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceError {
    /// An action that is not in wgpu 30's form.
    #[error("{reason}, in {action}")]
    Action {
        /// The first line of the action.
        action: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A launch whose pipeline or bind group the trace does not have.
    #[error("the trace launches a kernel whose {0} it did not create")]
    Unknown(&'static str),
}

/// What a trace has created so far, by address. A reused address stands for the later object: wgpu keeps
/// what a submission uses until that is traced.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// The names of the pipelines' kernels.
    kernels: HashMap<Id, String>,
    groups: HashMap<Id, Vec<Part>>,
}

impl Trace {
    /// Launches in the next part of a trace, and the bytes of it that were read. An unfinished action at its
    /// end is left.
    pub(crate) fn follow(&mut self, text: &str) -> Result<(Vec<Launch>, usize), TraceError> {
        let (actions, length) = complete_actions(text);
        let mut launches = Vec::new();
        for action in actions {
            self.follow_action(action, &mut launches)?;
        }
        Ok((launches, length))
    }

    /// Stores what an action creates, and adds the launches that it submits.
    fn follow_action(
        &mut self,
        action: &str,
        launches: &mut Vec<Launch>,
    ) -> Result<(), TraceError> {
        if !READ.iter().any(|name| action.starts_with(name)) {
            return Ok(());
        }
        let parsed: Action = ron::from_str(action).map_err(|error| TraceError::Action {
            action: action.lines().next().unwrap_or_default().to_string(),
            reason: error.to_string(),
        })?;
        match parsed {
            Action::CreateBindGroup(id, group) => {
                let parts = group.entries.into_iter().map(|entry| {
                    let Resource::Buffer(part) = entry.resource;
                    part
                });
                self.groups.insert(id, parts.collect());
            }
            Action::CreateComputePipeline { id, desc } => {
                let entry_point = desc.stage.entry_point.unwrap_or_default();
                self.kernels.insert(id, kernel_name(&entry_point));
            }
            Action::Submit(_, commands) => {
                for command in commands {
                    if let Command::RunComputePass { pass } = command {
                        self.run(&pass.commands, launches)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds the launches of a pass.
    fn run(&self, commands: &[PassCommand], launches: &mut Vec<Launch>) -> Result<(), TraceError> {
        let mut pipeline = None;
        let mut groups = BTreeMap::new();
        for command in commands {
            match command {
                PassCommand::SetPipeline(id) => pipeline = Some(id),
                PassCommand::SetBindGroup { index, bind_group } => {
                    groups.insert(index, bind_group.as_ref());
                }
                PassCommand::DispatchWorkgroups(_) | PassCommand::DispatchWorkgroupsIndirect {} => {
                    let bound = groups.values().copied().flatten();
                    launches.push(self.launch(pipeline, bound)?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn launch<'a>(
        &self,
        pipeline: Option<&Id>,
        groups: impl Iterator<Item = &'a Id>,
    ) -> Result<Launch, TraceError> {
        let kernel = pipeline.and_then(|id| self.kernels.get(id));
        let kernel = kernel.ok_or(TraceError::Unknown("pipeline"))?;
        let mut parts: HashSet<Part> = HashSet::new();
        for id in groups {
            let group = self.groups.get(id);
            parts.extend(group.ok_or(TraceError::Unknown("bind group"))?);
        }
        Ok(Launch {
            kernel: kernel.clone(),
            // CubeCL gives a size, except for empty buffers.
            bytes: parts.iter().filter_map(|part| part.size).sum(),
        })
    }
}

/// A kernel's name: that of its entry point without CubeCL's hash at the end.
fn kernel_name(entry_point: &str) -> String {
    let name = match entry_point.rsplit_once('_') {
        Some((name, hash)) if hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            name
        }
        _ => entry_point,
    };
    name.to_string()
}

/// The complete actions in a part of a trace, and the bytes up to the end of the last.
fn complete_actions(text: &str) -> (Vec<&str>, usize) {
    let mut actions = Vec::new();
    let mut start = 0;
    let mut depth = 0_usize;
    let (mut quoted, mut escaped) = (false, false);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                actions.push(text[start..index].trim());
                start = index + 1;
            }
            _ => {}
        }
    }
    (actions, start)
}

// The part of wgpu's trace that is read here, by wgpu's names.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
enum Id {
    PointerId(u64),
}

#[derive(Debug, Deserialize)]
enum Action {
    CreateBindGroup(Id, BindGroup),
    CreateComputePipeline { id: Id, desc: Pipeline },
    Submit(IgnoredAny, Vec<Command>),
}

#[derive(Debug, Deserialize)]
struct BindGroup {
    entries: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    resource: Resource,
}

#[derive(Debug, Deserialize)]
enum Resource {
    Buffer(Part),
}

/// Part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
struct Part {
    buffer: Id,
    offset: u64,
    size: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Pipeline {
    stage: Stage,
}

#[derive(Debug, Deserialize)]
struct Stage {
    entry_point: Option<String>,
}

#[derive(Debug, Deserialize)]
enum Command {
    ClearBuffer {},
    CopyBufferToBuffer {},
    InsertDebugMarker(IgnoredAny),
    PopDebugGroup,
    PushDebugGroup(IgnoredAny),
    ResolveQuerySet {},
    RunComputePass { pass: Pass },
    WriteTimestamp {},
}

#[derive(Debug, Deserialize)]
struct Pass {
    commands: Vec<PassCommand>,
}

#[derive(Debug, Deserialize)]
enum PassCommand {
    BeginPipelineStatisticsQuery {},
    DispatchWorkgroups(IgnoredAny),
    DispatchWorkgroupsIndirect {},
    EndPipelineStatisticsQuery,
    InsertDebugMarker {},
    PopDebugGroup,
    PushDebugGroup {},
    SetBindGroup { index: u32, bind_group: Option<Id> },
    SetImmediate {},
    SetPipeline(Id),
    TransitionResources {},
    WriteTimestamp {},
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As wgpu writes it, with actions in between left out.
    const TRACE: &str = r#"CreateComputePipeline(
    id: PointerId(5),
    desc: (
        label: Some("add, \"one\" (1_0f2e3d4c"),
        layout: Some(PointerId(4)),
        stage: (
            module: PointerId(3),
            entry_point: Some("add_one_0f2e3d4c"),
            constants: {},
            zero_initialize_workgroup_memory: false,
        ),
        cache: None,
    ),
),
CreateBindGroup(PointerId(9), (
    label: None,
    layout: PointerId(2),
    entries: [
        (
            binding: 0,
            resource: Buffer((
                buffer: PointerId(7),
                offset: 256,
                size: Some(1000),
            )),
        ),
        (
            binding: 1,
            resource: Buffer((
                buffer: PointerId(7),
                offset: 256,
                size: Some(1000),
            )),
        ),
        (
            binding: 2,
            resource: Buffer((
                buffer: PointerId(7),
                offset: 2048,
                size: Some(24),
            )),
        ),
        (
            binding: 3,
            resource: Buffer((
                buffer: PointerId(8),
                offset: 0,
                size: None,
            )),
        ),
    ],
)),
WriteBuffer(
    id: PointerId(8),
    data: File("data1.bin"),
    offset: 0,
    size: 4,
    queued: true,
),
DropBindGroup(PointerId(9)),
Submit(1, [
    CopyBufferToBuffer(
        src: PointerId(7),
        src_offset: 0,
        dst: PointerId(8),
        dst_offset: 0,
        size: Some(4),
    ),
    RunComputePass(
        pass: (
            label: None,
            commands: [
                SetPipeline(PointerId(5)),
                SetBindGroup(
                    index: 0,
                    num_dynamic_offsets: 0,
                    bind_group: Some(PointerId(9)),
                ),
                DispatchWorkgroups((1, 2, 3)),
                DispatchWorkgroups((1, 1, 1)),
            ],
            dynamic_offsets: [],
            string_data: [],
            immediates_data: [],
        ),
        timestamp_writes: None,
    ),
]),
"#;

    fn launches(trace: &str) -> Result<Vec<Launch>, TraceError> {
        Ok(Trace::default().follow(trace)?.0)
    }

    #[test]
    fn each_part_counts_once_for_each_launch() {
        let wanted = Launch {
            kernel: "add_one".to_string(),
            bytes: 1024,
        };
        assert_eq!(launches(TRACE).unwrap(), [wanted.clone(), wanted]);
    }

    #[test]
    fn an_action_that_is_being_written_is_left_for_later() {
        let (whole, length) = complete_actions(TRACE);
        assert_eq!((whole.len(), length), (5, TRACE.len() - 1));
        let (part, length) = complete_actions(&TRACE[..TRACE.len() - 3]);
        assert_eq!(part, &whole[..4]);
        assert!(TRACE[length..].trim_start().starts_with("Submit(1"));
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        let unknown = launches(&TRACE.replace("DispatchWorkgroups(", "DrawMesh(")).unwrap_err();
        assert!(matches!(unknown, TraceError::Action { .. }), "{unknown}");
        let missing = launches(&TRACE.replace("SetPipeline(PointerId(5))", "PopDebugGroup"));
        let missing = missing.unwrap_err();
        assert!(
            matches!(missing, TraceError::Unknown("pipeline")),
            "{missing}"
        );
    }
}
