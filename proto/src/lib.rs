//! Wire contracts, generated from the .proto files beside it.
//!
//! Nothing is written here by hand but this page: a message's meaning is in its `.proto` file. The router's
//! `grpc/convert` is the only place where these types meet others.

/// `quire.v1`: Quire's own contract.
pub mod quire {
    #[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("quire.v1");
    }
}

/// `vllm.grpc.engine`: what gateways drive engines by, tokens in and tokens out.
pub mod vllm {
    pub mod grpc {
        #[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// `smg.grpc.common`: messages that `vllm.grpc.engine` shares with others.
pub mod smg {
    pub mod grpc {
        #[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
        pub mod common {
            tonic::include_proto!("smg.grpc.common");
        }
    }
}

/// `inference`: the open inference protocol of KServe and Triton.
#[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
pub mod inference {
    tonic::include_proto!("inference");
}

/// All contracts of this crate as an encoded `FileDescriptorSet`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptors");

#[cfg(test)]
mod tests {
    use prost::Message;

    #[test]
    fn descriptors_name_every_method() {
        let text = String::from_utf8_lossy(super::FILE_DESCRIPTOR_SET).into_owned();
        for method in ["Generate", "GenerateStream", "Chat", "ChatStream", "Abort", "ModelInfo", "Stats"] {
            assert!(text.contains(method), "{method} is not in the descriptors");
        }
        // What reflection hands out has the contracts of others, too.
        for service in ["VllmEngine", "SubscribeKvEvents", "GRPCInferenceService", "ModelStreamInfer"] {
            assert!(text.contains(service), "{service} is not in the descriptors");
        }
    }

    /// Numbers are what the wire knows a field by; these are the ones that other programs were built with.
    #[test]
    fn fields_of_others_have_their_numbers() {
        use super::inference::{ModelInferRequest, ModelInferResponse};
        use super::smg::grpc::common::{KvBlock, KvBlocksStored, KvCacheEvent, KvEventBatch, kv_cache_event::Data};
        use super::vllm::grpc::engine::{GenerateComplete, GenerateRequest, SamplingParams};
        // Tag (number * 8 + wire type), length, content.
        let request = GenerateRequest { request_id: "a".into(), stream: true, ..Default::default() };
        assert_eq!(request.encode_to_vec(), [0x0a, 1, b'a', 0x28, 1]);
        let sampling = SamplingParams { max_tokens: Some(5), n: 2, seed: Some(3), ..Default::default() };
        assert_eq!(sampling.encode_to_vec(), [0x40, 5, 0x78, 2, 0xc0, 1, 3]);
        let complete = GenerateComplete { output_ids: vec![7], index: 1, ..Default::default() };
        assert_eq!(complete.encode_to_vec(), [0x0a, 1, 7, 0x40, 1]);
        let infer = ModelInferRequest { id: "a".into(), raw_input_contents: vec![vec![1]], ..Default::default() };
        assert_eq!(infer.encode_to_vec(), [0x1a, 1, b'a', 0x3a, 1, 1]);
        let infer = ModelInferResponse { raw_output_contents: vec![vec![1]], ..Default::default() };
        assert_eq!(infer.encode_to_vec(), [0x32, 1, 1]);
        let block = KvBlock { block_hash: 1, token_ids: vec![2], block_size: 3 };
        assert_eq!(block.encode_to_vec(), [0x08, 1, 0x12, 1, 2, 0x18, 3]);
        let stored = KvBlocksStored { parent_block_hash: Some(4), group_idx: Some(5), ..Default::default() };
        assert_eq!(stored.encode_to_vec(), [0x10, 4, 0x28, 5]);
        let event = KvCacheEvent { event_id: 1, data: Some(Data::Stored(stored)) };
        assert_eq!(event.encode_to_vec(), [0x08, 1, 0x12, 4, 0x10, 4, 0x28, 5]);
        let batch = KvEventBatch { sequence_number: 1, events: vec![event], ..Default::default() };
        assert_eq!(batch.encode_to_vec(), [0x08, 1, 0x1a, 8, 0x08, 1, 0x12, 4, 0x10, 4, 0x28, 5]);
    }

    #[test]
    fn absent_and_empty_differ_where_they_must() {
        use super::quire::v1::{SamplingParams, TokenIds};
        let none = SamplingParams::default();
        let zero = SamplingParams { temperature: Some(0.0), seed: Some(0), ..none.clone() };
        let empty = SamplingParams { allowed_token_ids: Some(TokenIds { ids: vec![] }), ..none.clone() };
        for message in [none, zero, empty] {
            assert_eq!(SamplingParams::decode(message.encode_to_vec().as_slice()).as_ref(), Ok(&message));
        }
    }
}
