//! Wire contracts, generated from the .proto files beside it.
//!
//! Nothing is written here by hand but this page: a message's meaning is in its `.proto` file. The router's
//! `grpc/convert.rs` is the only place where these types meet others.

/// `quire.v1`: Quire's own contract.
pub mod quire {
    #[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("quire.v1");
    }
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
