#![allow(clippy::unwrap_used)]

use mirai_engine::SlotId;
use mirai_model::backend::{BatchRow, CacheLayout};

use super::*;
use crate::records::{Edit, NO_SLOT, word};

const CLASS: WorkClass = WorkClass { q_heads: 4, kv_heads: 2, window: None, causal: true };
const WHOLE: WorkClass = WorkClass { causal: false, ..CLASS };

fn builder() -> StepBuilder {
    let mut builder = StepBuilder {
        classes: vec![(CLASS, 6), (WHOLE, 6)],
        mask_words: 3,
        groups: 1,
        ..StepBuilder::default()
    };
    builder.buckets = [1, 2, 4].map(|n| (n, Rc::new(builder.layout(n, n, n)))).into();
    builder
}

fn slots() -> Slots {
    Slots::new(&CacheLayout { groups: vec![], blocks: 0, slots: 4, snapshots: 0, table_len: 8 })
}

fn row(slot: u32, first: usize, len: usize, start: usize, last_drawn: bool) -> BatchRow {
    BatchRow { slot: SlotId(slot), first, len, start, last_drawn, sample: true, pool: false, outputs: (0, 0) }
}

fn words(bytes: &mut [u8], section: Section) -> Vec<u32> {
    let part = section.of(bytes);
    (0..part.len() / 4).map(|i| word(part, i)).collect()
}

#[test]
fn buckets_end_at_the_limit() {
    assert_eq!(buckets(1), [1]);
    assert_eq!(buckets(6), [1, 2, 4, 6]);
    assert_eq!(buckets(64), [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]);
    assert_eq!(buckets(100)[10..], [64, 80, 96, 100]);
    let all = buckets(5000);
    assert_eq!((all.last(), all.len()), (Some(&1024), 27));
    assert!(all.windows(2).all(|w| w[0] < w[1]));
}

#[test]
fn a_decode_step_is_padded_to_its_bucket() {
    let mut builder = builder();
    let batch = Batch {
        ids: vec![7, 0, 9],
        positions: vec![40, 3, 0],
        rows: vec![row(2, 0, 1, 40, false), row(1, 1, 1, 3, true), row(0, 2, 1, 0, false)],
        outputs: vec![0, 1],
    };
    let mut step = builder.shape(DevicePtr::default().add(4096), &batch);
    assert_eq!((step.bucket, step.tokens, step.outputs, step.sequences()), (Some(2), 4, 4, 4));
    assert!(!step.is_whole());
    let mut out = vec![0xee; step.layout().bytes];
    builder.write(&mut step, &batch, &slots(), &mut out).unwrap();
    let layout = step.layout().clone();
    assert_eq!(words(&mut out, layout.ids), [7, FROM_SLOT | 1, 9, 0]);
    assert_eq!(words(&mut out, layout.positions), [40, 3, 0, 0]);
    assert_eq!(words(&mut out, layout.token_rows), [0, 1, 2, 3]);
    assert_eq!(words(&mut out, layout.rows)[..4], [2, 0, 1, 41]);
    assert_eq!(words(&mut out, layout.rows)[12..], [4, 3, 0, 1], "the reserved slot");
    assert_eq!(words(&mut out, layout.outputs), [0, 1, 0, 0]);
    assert_eq!(words(&mut out, layout.output_rows), [NO_ROW; 4]);
    let starts = words(&mut out, layout.work[0].starts);
    // Three live rows times two kv heads; the padding row has no work.
    assert_eq!((starts.len(), starts[0], starts[6]), (7, 0, 6));
    let work = step.work(CLASS).unwrap();
    assert_eq!((work.decodes, work.prefill_items, work.grid), (true, 0, 6));
    assert_eq!(work.starts, DevicePtr::default().add(4096 + layout.work[0].starts.offset as u64));
    let error = step.work(WorkClass { window: Some(3), ..CLASS }).unwrap_err().to_string();
    assert!(error.contains("outline"), "{error}");
    let five = Batch { rows: vec![row(0, 0, 1, 0, false); 5], ..Batch::default() };
    assert_eq!(builder.shape(DevicePtr::default(), &five).bucket, None);
}

#[test]
fn a_mixed_step_is_as_long_as_it_is() {
    let mut builder = builder();
    let mut pooling = row(3, 1, 5, 0, false);
    (pooling.pool, pooling.outputs) = (true, (0, 1));
    let batch = Batch {
        ids: (0..6).collect(),
        positions: vec![9, 0, 1, 2, 3, 4],
        rows: vec![row(1, 0, 1, 9, false), pooling],
        outputs: vec![5],
    };
    let mut step = builder.shape(DevicePtr::default(), &batch);
    assert_eq!((step.bucket, step.tokens, step.outputs, step.sequences()), (None, 6, 1, 2));
    let mut out = vec![0; step.layout().bytes];
    builder.write(&mut step, &batch, &slots(), &mut out).unwrap();
    let layout = step.layout().clone();
    assert_eq!(words(&mut out, layout.token_rows), [0, 1, 1, 1, 1, 1]);
    assert_eq!(words(&mut out, layout.output_rows), [1]);
    let (causal, whole) = (step.work(CLASS).unwrap(), step.work(WHOLE).unwrap());
    assert!(causal.decodes && !whole.decodes);
    assert_eq!((causal.prefill_items, whole.prefill_items), (2, 4), "rows of one token too");
}

#[test]
fn idle_steps_have_the_layout_of_their_bucket() {
    let mut builder = builder();
    let mut step = builder.idle(DevicePtr::default(), 2).unwrap();
    assert!(builder.idle(DevicePtr::default(), 3).is_none());
    let mut out = vec![0; step.layout().bytes];
    builder.write(&mut step, &Batch::default(), &slots(), &mut out).unwrap();
    let layout = step.layout().clone();
    assert_eq!(layout, builder.layout(2, 2, 2));
    assert_eq!(words(&mut out, layout.rows), [4, 0, 0, 1, 4, 1, 0, 1]);
    assert!(step.work(CLASS).unwrap().decodes, "the recorded kernel is there even with nothing to do");
}

#[test]
fn draws_and_granules_lie_where_the_layout_says() {
    let layout = builder().layout(2, 2, 2);
    let mut draws = Draws::default();
    draws.rows = vec![SampleRow { slot: 1, ..SampleRow::IDLE }];
    draws.edits = vec![Edit { token: 5, bias: 1.0 }];
    draws.masks = vec![1, 2, 3];
    let mut whole = vec![0; layout.bytes];
    write_draws(&layout, 2, &draws, 0, &mut whole);
    let samples = words(&mut whole, layout.samples);
    assert_eq!((samples[11], samples[31]), (1, NO_SLOT));
    assert_eq!((draws.mask_bytes(), draws.list_bytes()), (16, 24));
    let lists = words(&mut whole, layout.lists);
    assert_eq!((&lists[..3], &lists[4..6]), (&[1, 2, 3][..], &[5, 0x3f80_0000][..]));
    let base = layout.samples.offset;
    let mut late = vec![0; layout.bytes - base];
    write_draws(&layout, 2, &draws, base, &mut late);
    assert_eq!(late, whole[base..]);

    let mut out = vec![0; layout.bytes];
    write_granules(layout.granules, 100, &[(3, [1, 2, 3, 4]), (9, [5, 6, 7, 8])], &mut out);
    let data = 100 + layout.granules[2].offset as u32 / 16;
    assert_eq!(words(&mut out, layout.granules[0])[..2], [data, data + 1]);
    assert_eq!(words(&mut out, layout.granules[1])[..2], [3, 9]);
    assert_eq!(words(&mut out, layout.granules[2])[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn steps_that_do_not_depend_on_the_batch_have_no_decode_items() {
    let mut builder = StepBuilder { batch_invariant: true, ..builder() };
    let batch = Batch {
        ids: vec![7, 8, 9],
        positions: vec![40, 3, 0],
        rows: vec![row(2, 0, 1, 40, false), row(1, 1, 1, 3, false), row(0, 2, 1, 0, false)],
        outputs: vec![],
    };
    let mut step = builder.shape(DevicePtr::default(), &batch);
    let mut out = vec![0; step.layout().bytes];
    builder.write(&mut step, &batch, &slots(), &mut out).unwrap();
    let work = step.work(CLASS).unwrap();
    assert_eq!((work.decodes, work.prefill_items), (false, 8), "four rows of two kv heads");
    let prefill = words(&mut out, step.layout().clone().work[0].prefill);
    let rows: Vec<u32> = prefill.chunks(3).take(8).map(|item| item[0]).collect();
    assert_eq!(rows, [0, 0, 1, 1, 2, 2, 3, 3], "the last are padding");
}
