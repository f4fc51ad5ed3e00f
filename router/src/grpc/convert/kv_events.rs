//! What the prefix cache holds, in the words that gateways of `vllm.grpc.engine` read.

use std::sync::Arc;
use std::time::Duration;

use quire_engine::KvEventBatch;
use quire_engine::scheduler::{BlockHash, CacheSalt, FlushReport, KvBlock, KvEvent, KvGroupKind, ShortHash};
use quire_proto::smg::grpc::common as wire;
use quire_proto::smg::grpc::common::kv_cache_event::Data;

use crate::error::ApiError;

use super::invalid;

/// Longest wait for an idle engine.
const MAX_FLUSH_TIMEOUT: f32 = 600.0;

/// How long a flush waits until nothing runs.
pub(in crate::grpc) fn flush_timeout(request: &wire::FlushCacheRequest) -> Result<Duration, ApiError> {
    match request.timeout_s {
        seconds if (0.0..=MAX_FLUSH_TIMEOUT).contains(&seconds) => Ok(Duration::from_secs_f32(seconds)),
        _ => Err(invalid("timeout_s", "must be 0 to 600")),
    }
}

/// What a flush did.
pub(in crate::grpc) fn flushed(report: FlushReport) -> wire::FlushCacheResponse {
    let FlushReport { num_dropped, num_held } = report;
    let message = match num_held {
        0 => format!("dropped {num_dropped} cached blocks"),
        _ => format!("dropped {num_dropped} cached blocks; {num_held} are held by running requests and stay"),
    };
    wire::FlushCacheResponse { success: num_held == 0, message }
}

/// What every batch of a subscription needs.
pub(in crate::grpc) struct Words {
    block_size: u32,
    groups: Arc<[KvGroupKind]>,
    /// Of blocks that whoever sends no salt can hit.
    plain_root: ShortHash,
}

impl Words {
    pub(in crate::grpc) fn new(block_size: u32, groups: Arc<[KvGroupKind]>, plain_salt: &CacheSalt) -> Self {
        Self { block_size, groups, plain_root: BlockHash::root(plain_salt, None).short() }
    }

    pub(in crate::grpc) fn batch(&self, batch: &KvEventBatch) -> wire::KvEventBatch {
        let mut token_ids = batch.events.token_ids.chunks_exact(self.block_size as usize);
        let mut events: Vec<wire::KvCacheEvent> = Vec::new();
        for event in &batch.events.events {
            let data = match event {
                KvEvent::Stored(block) => {
                    let stored = wire::KvBlock {
                        block_hash: signed(block.hash),
                        token_ids: token_ids.next().unwrap_or_default().to_vec(),
                        block_size: i32::try_from(self.block_size).unwrap_or(i32::MAX),
                    };
                    if let Some(Data::Stored(before)) = events.last_mut().and_then(|event| event.data.as_mut())
                        && before.group_idx == Some(block.group)
                        && before.blocks.last().map(|last| last.block_hash) == block.parent.map(signed)
                    {
                        before.blocks.push(stored);
                        continue;
                    }
                    Data::Stored(self.chain(block, stored))
                }
                KvEvent::Removed { group, hash } => {
                    if let Some(Data::Removed(before)) = events.last_mut().and_then(|event| event.data.as_mut())
                        && before.group_idx == Some(*group)
                    {
                        before.block_hashes.push(signed(*hash));
                        continue;
                    }
                    Data::Removed(wire::KvBlocksRemoved {
                        block_hashes: vec![signed(*hash)],
                        tier: Some(wire::KvCacheTier::Device.into()),
                        group_idx: Some(*group),
                        locality: Some(wire::KvCacheLocality::Local.into()),
                    })
                }
                KvEvent::Cleared => Data::Cleared(wire::KvCacheCleared {}),
            };
            // Those of a snapshot happened at no moment.
            let event_id = if batch.snapshot.is_some() { 0 } else { events.len() as u64 + 1 };
            events.push(wire::KvCacheEvent { event_id, data: Some(data) });
        }
        wire::KvEventBatch {
            sequence_number: batch.sequence_number,
            timestamp: batch.timestamp,
            events,
            dp_rank: Some(0),
            snapshot: batch.snapshot.map(|snapshot| wire::KvSnapshotChunk {
                index: snapshot.index,
                count: snapshot.count,
                blocks: snapshot.num_blocks,
            }),
        }
    }

    /// A chain that begins with this block.
    fn chain(&self, block: &KvBlock, first: wire::KvBlock) -> wire::KvBlocksStored {
        let (kind, window) = match self.groups.get(block.group as usize) {
            Some(KvGroupKind::SlidingWindow { window }) => ("sliding_window", Some(*window)),
            Some(KvGroupKind::Full) | None => ("full_attention", None),
        };
        wire::KvBlocksStored {
            blocks: vec![first],
            parent_block_hash: block.parent.map(signed),
            tier: Some(wire::KvCacheTier::Device.into()),
            group_idx: Some(block.group),
            kv_cache_spec_kind: Some(kind.to_owned()),
            kv_cache_spec_sliding_window: window,
            locality: Some(wire::KvCacheLocality::Local.into()),
            cache_salt: (block.root != self.plain_root).then(|| format!("{:016x}", block.root.0)),
        }
    }
}

fn signed(hash: ShortHash) -> i64 {
    i64::from_ne_bytes(hash.0.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use quire_engine::scheduler::KvEvents;

    use super::*;

    #[test]
    fn chains_are_one_event_and_others_events_of_their_own() {
        let plain = CacheSalt([1; 32]);
        let plain_root = BlockHash::root(&plain, None).short();
        let block = |group, hash, parent: Option<u64>, root| {
            KvEvent::Stored(KvBlock { group, hash: ShortHash(hash), parent: parent.map(ShortHash), root })
        };
        let removed = |group, hash| KvEvent::Removed { group, hash: ShortHash(hash) };
        let events = vec![
            block(0, 1, None, plain_root),
            block(0, 2, Some(1), plain_root),
            block(1, 3, Some(2), plain_root),
            block(0, 4, Some(2), plain_root),
            block(0, u64::MAX, None, ShortHash(7)),
            removed(0, 1),
            removed(0, 2),
            removed(1, 3),
            KvEvent::Cleared,
        ];
        let groups = [KvGroupKind::Full, KvGroupKind::SlidingWindow { window: 8 }];
        let words = Words::new(2, groups.into(), &plain);
        let events = Arc::new(KvEvents { events, token_ids: (0..10).collect(), has_lost: false });
        let batch = words.batch(&KvEventBatch { sequence_number: 9, timestamp: 1.5, snapshot: None, events });
        assert_eq!((batch.sequence_number, batch.dp_rank, batch.snapshot), (9, Some(0), None));
        let mut stored = Vec::new();
        let mut gone = Vec::new();
        for (at, event) in batch.events.iter().enumerate() {
            assert_eq!(event.event_id, at as u64 + 1);
            match event.data.as_ref().expect("data") {
                Data::Stored(chain) => {
                    let blocks: Vec<_> = chain.blocks.iter().map(|b| (b.block_hash, b.token_ids.clone())).collect();
                    assert!(chain.blocks.iter().all(|block| block.block_size == 2));
                    stored.push((chain.group_idx, chain.parent_block_hash, blocks, chain.cache_salt.clone()));
                }
                Data::Removed(removed) => gone.push((removed.group_idx, removed.block_hashes.clone())),
                Data::Cleared(_) => assert_eq!(at, batch.events.len() - 1),
            }
        }
        assert_eq!(
            stored,
            [
                (Some(0), None, vec![(1, vec![0, 1]), (2, vec![2, 3])], None),
                (Some(1), Some(2), vec![(3, vec![4, 5])], None),
                (Some(0), Some(2), vec![(4, vec![6, 7])], None),
                (Some(0), None, vec![(-1, vec![8, 9])], Some("0000000000000007".to_owned())),
            ]
        );
        assert_eq!(gone, [(Some(0), vec![1, 2]), (Some(1), vec![3])]);
    }

    #[test]
    fn waits_have_a_bound() {
        let timeout = |timeout_s| flush_timeout(&wire::FlushCacheRequest { timeout_s });
        assert_eq!(timeout(1.5), Ok(Duration::from_millis(1500)));
        for wrong in [-1.0, f32::NAN, f32::INFINITY, 601.0] {
            assert!(timeout(wrong).is_err(), "{wrong}");
        }
    }
}
