//! A step on its way to the device: its shape there, and the lists that go up with it.
//!
//! Owns the padding of a step to its bucket, and what the kernels' lists hold. Padding rows have the reserved slot, whose
//! tables name page 0 alone, and no tokens as far as states and work items go; their draws have no slot. Never: copies and launches.

use std::rc::Rc;

use mirai_model::backend::{Batch, Result};

use crate::driver::DevicePtr;
use crate::error::device;
use crate::records::{PrefillItem, RowInfo, SampleRow, write_records};
use crate::sampling::Draws;
use crate::slots::{GRANULE, Slots};
use crate::upload::{Counts, Layout, NO_ROW, Section};
use crate::work::{DecodeWork, WorkClass, decode_work, prefill_work};

/// An id with this bit is a slot: the token that it drew last.
const FROM_SLOT: u32 = 1 << 31;

/// Rows of the recorded steps, up to `most`.
pub(crate) fn buckets(most: usize) -> Vec<usize> {
    let mut all = vec![1, 2, 4];
    let ranges = [(8, 64, 8), (64, 128, 16), (128, 256, 32), (256, 512, 64), (512, 1024, 128)];
    for (from, to, step) in ranges {
        all.extend((from..to).step_by(step));
    }
    all.push(1024);
    let mut fit: Vec<usize> = all.into_iter().filter(|rows| *rows < most).collect();
    fit.push(most.clamp(1, 1024));
    fit.dedup();
    fit
}

/// Work lists of one class of layers on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepWork {
    pub(crate) starts: DevicePtr,
    pub(crate) items: DevicePtr,
    pub(crate) prefill: DevicePtr,
    /// Blocks of the decode kernel.
    pub(crate) grid: usize,
    /// Whether there are decode rows.
    pub(crate) decodes: bool,
    /// Blocks of the prefill kernel.
    pub(crate) prefill_items: usize,
}

/// The step in progress, as launches see it.
#[derive(Debug, Default)]
pub(crate) struct Step {
    upload: DevicePtr,
    layout: Rc<Layout>,
    /// Tokens, padding included.
    pub(crate) tokens: usize,
    /// Outputs, padding included.
    pub(crate) outputs: usize,
    rows: usize,
    /// Which bucket it is padded to.
    pub(crate) bucket: Option<usize>,
    work: Vec<(WorkClass, StepWork)>,
    whole: bool,
}

impl Step {
    fn at(&self, section: Section) -> DevicePtr {
        self.upload.add(section.offset as u64)
    }
    pub(crate) fn ids(&self) -> DevicePtr {
        self.at(self.layout.ids)
    }
    pub(crate) fn positions(&self) -> DevicePtr {
        self.at(self.layout.positions)
    }
    pub(crate) fn token_rows(&self) -> DevicePtr {
        self.at(self.layout.token_rows)
    }
    pub(crate) fn rows_at(&self) -> DevicePtr {
        self.at(self.layout.rows)
    }
    pub(crate) fn outputs_at(&self) -> DevicePtr {
        self.at(self.layout.outputs)
    }
    pub(crate) fn output_rows(&self) -> DevicePtr {
        self.at(self.layout.output_rows)
    }
    pub(crate) fn samples(&self) -> DevicePtr {
        self.at(self.layout.samples)
    }
    /// Masks, and edits behind them.
    pub(crate) fn lists(&self) -> DevicePtr {
        self.at(self.layout.lists)
    }
    /// Lists of the tables' granules: where from, where to, what.
    pub(crate) fn granules(&self, list: usize) -> DevicePtr {
        self.at(self.layout.granules[list])
    }
    /// Where it goes.
    pub(crate) const fn upload(&self) -> DevicePtr {
        self.upload
    }
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }
    /// Sequences, padding included.
    pub(crate) const fn sequences(&self) -> usize {
        self.rows
    }
    /// Whether every sequence begins in this step.
    pub(crate) const fn is_whole(&self) -> bool {
        self.whole
    }
    /// Work lists of a class.
    pub(crate) fn work(&self, class: WorkClass) -> Result<StepWork> {
        let found = self.work.iter().find(|(other, _)| *other == class);
        found
            .map(|(_, work)| *work)
            .ok_or_else(|| device("attention", format!("{class:?} was not in the model's outline")))
    }
}

/// Scratch of the host, and what does not change from step to step.
#[derive(Default)]
pub(crate) struct StepBuilder {
    /// Classes of layers, and the grids of their decode kernels.
    pub(crate) classes: Vec<(WorkClass, usize)>,
    /// Layouts of the buckets.
    pub(crate) buckets: Vec<(usize, Rc<Layout>)>,
    /// Decode rows take the prefill kernel, which adds up a query's keys in one order whatever stands beside it.
    pub(crate) batch_invariant: bool,
    /// Words of a mask, and groups with tables.
    pub(crate) mask_words: usize,
    pub(crate) groups: usize,
    rows: Vec<RowInfo>,
    decode: DecodeWork,
    prefill: Vec<PrefillItem>,
}

impl StepBuilder {
    fn counts(&self, tokens: usize, rows: usize, outputs: usize) -> Counts {
        let (mask_words, groups) = (self.mask_words, self.groups);
        Counts { tokens, rows, outputs, masks: rows, mask_words, groups }
    }

    /// Layout of a step of so many tokens, rows and outputs.
    pub(crate) fn layout(&self, tokens: usize, rows: usize, outputs: usize) -> Layout {
        Layout::new(&self.counts(tokens, rows, outputs), &self.classes)
    }

    /// Room for edits in a layout of so many rows, in bytes.
    pub(crate) fn edit_bytes(&self, rows: usize) -> usize {
        self.counts(0, rows, 0).edit_bytes()
    }

    /// The shape of a step on the device.
    pub(crate) fn shape(&self, upload: DevicePtr, batch: &Batch) -> Step {
        let decodes = !batch.rows.is_empty() && batch.rows.iter().all(|row| row.len == 1);
        let bucket =
            decodes.then(|| self.buckets.iter().position(|(rows, _)| *rows >= batch.rows.len())).flatten();
        let (tokens, rows) = (batch.positions.len(), batch.rows.len());
        let mut step = Step {
            upload,
            tokens,
            rows,
            outputs: batch.outputs.len(),
            whole: batch.rows.iter().all(|row| row.start == 0),
            ..Step::default()
        };
        match bucket {
            Some(index) => {
                let (rows, layout) = &self.buckets[index];
                (step.tokens, step.rows, step.outputs) = (*rows, *rows, *rows);
                (step.bucket, step.layout) = (Some(index), Rc::clone(layout));
            }
            None => step.layout = Rc::new(self.layout(tokens, rows, step.outputs)),
        }
        step
    }

    /// A step of padding alone, to record a bucket.
    pub(crate) fn idle(&self, upload: DevicePtr, bucket: usize) -> Option<Step> {
        let index = self.buckets.iter().position(|(rows, _)| *rows == bucket)?;
        let layout = Rc::clone(&self.buckets[index].1);
        let (tokens, rows, outputs) = (bucket, bucket, bucket);
        let bucket = Some(index);
        Some(Step { upload, layout, tokens, rows, outputs, bucket, ..Step::default() })
    }

    /// Writes the lists of the forward pass, and notes in the step where its work is.
    pub(crate) fn write(
        &mut self,
        step: &mut Step,
        batch: &Batch,
        slots: &Slots,
        out: &mut [u8],
    ) -> Result<()> {
        let layout = Rc::clone(&step.layout);
        let live = batch.positions.len();
        let idle_tokens = live..step.tokens;
        let mut ids = batch.ids.clone();
        for row in batch.rows.iter().filter(|row| row.last_drawn) {
            ids[row.first] = slots.resumed(row.slot)?.unwrap_or(FROM_SLOT | row.slot.0);
        }
        write_records(layout.ids.of(out), ids.into_iter().chain(idle_tokens.clone().map(|_| 0)));
        let positions = batch.positions.iter().copied();
        write_records(layout.positions.of(out), positions.chain(idle_tokens.clone().map(|_| 0)));
        let row_of =
            batch.rows.iter().enumerate().flat_map(|(i, row)| std::iter::repeat_n(i as u32, row.len));
        write_records(layout.token_rows.of(out), row_of.chain(idle_tokens.map(|token| token as u32)));

        self.rows.clear();
        self.rows.extend(batch.rows.iter().map(|row| RowInfo {
            slot: row.slot.0,
            first: row.first as u32,
            tokens: row.len as u32,
            context: (row.start + row.len) as u32,
        }));
        let reserved = slots.reserved();
        let padding = (self.rows.len()..step.rows).map(|row| RowInfo {
            slot: reserved,
            first: row as u32,
            tokens: 0,
            context: 1,
        });
        write_records(layout.rows.of(out), self.rows.iter().copied().chain(padding));

        let idle_outputs = batch.outputs.len()..step.outputs;
        let outputs = batch.outputs.iter().copied();
        write_records(layout.outputs.of(out), outputs.chain(idle_outputs.clone().map(|_| 0)));
        let mut pooled = vec![NO_ROW; step.outputs];
        for (index, row) in batch.rows.iter().enumerate().filter(|(_, row)| row.pool) {
            pooled[row.outputs.0..row.outputs.1].fill(index as u32);
        }
        write_records(layout.output_rows.of(out), pooled);
        self.write_work(step, &layout, out);
        Ok(())
    }

    fn write_work(&mut self, step: &mut Step, layout: &Layout, out: &mut [u8]) {
        step.work.clear();
        for ((class, grid), sections) in self.classes.iter().zip(&layout.work) {
            // Rows that see everything lie whole in the step and go to the prefill kernel, however short.
            let (decodes, all) = if class.causal && !self.batch_invariant {
                decode_work(&self.rows, *class, *grid, &mut self.decode);
                (step.bucket.is_some() || !self.decode.items.is_empty(), false)
            } else {
                (false, true)
            };
            if decodes {
                write_records(sections.starts.of(out), self.decode.starts.iter().copied());
                write_records(sections.items.of(out), self.decode.items.iter().copied());
            }
            prefill_work(&self.rows, *class, all, &mut self.prefill);
            if all && step.bucket.is_some() {
                // A recorded step has as many blocks as its bucket: those of padding rows find no queries.
                let most = class.one_token_items(step.rows);
                let idle = PrefillItem { row: self.rows.len() as u32, ..PrefillItem::default() };
                self.prefill.resize(most, idle);
            }
            write_records(sections.prefill.of(out), self.prefill.iter().copied());
            let work = StepWork {
                starts: step.upload.add(sections.starts.offset as u64),
                items: step.upload.add(sections.items.offset as u64),
                prefill: step.upload.add(sections.prefill.offset as u64),
                grid: *grid,
                decodes,
                prefill_items: self.prefill.len(),
            };
            step.work.push((*class, work));
        }
    }
}

/// Writes what sampling reads; offsets count from `base`, the start of `out`.
pub(crate) fn write_draws(layout: &Layout, outputs: usize, draws: &Draws, base: usize, out: &mut [u8]) {
    let part = |section: Section, bytes: usize| {
        let from = section.offset - base;
        (from, from + bytes.min(section.bytes))
    };
    let (from, to) = part(layout.samples, usize::MAX);
    let idle = (draws.rows.len()..outputs).map(|_| SampleRow::IDLE);
    write_records(&mut out[from..to], draws.rows.iter().copied().chain(idle));
    let (from, to) = part(layout.lists, draws.list_bytes());
    let (masks, edits) = out[from..to].split_at_mut(draws.mask_bytes());
    write_records(masks, draws.masks.iter().copied());
    write_records(edits, draws.edits.iter().copied());
}

/// Writes changed granules of the tables: where from and where to, in granules from the start of the tables, and what.
/// The upload begins `upload` granules behind them.
pub(crate) fn write_granules(
    sections: [Section; 3],
    upload: usize,
    changes: &[(u32, [u32; GRANULE])],
    out: &mut [u8],
) {
    let data = upload + sections[2].offset / (GRANULE * 4);
    write_records(sections[0].of(out), (0..changes.len()).map(|index| (data + index) as u32));
    write_records(sections[1].of(out), changes.iter().map(|(to, _)| *to));
    write_records(sections[2].of(out), changes.iter().flat_map(|(_, entries)| *entries));
}

#[cfg(test)]
mod tests;
